"""Caches to and from disk: saved on one mesh, or none, and loaded on another with the same bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kvjax import checks, decode, sharding
from kvjax.cache import CacheShape, KVCache
from kvjax.policy import Policy
from kvjax.saving import facts as _facts
from kvjax.saving.arrangement import as_saved
from kvjax.saving.leaves import named, restripe
from kvjax.saving.store import Save, Saving, write


def save_cache(cache: KVCache, directory: Any, *, tokens: Any = None, model: Any = None, wait: bool = True) -> Saving:
    """Saves a cache; the former save in the directory stays until this one is complete, and then goes.

    When this returns the cache is copied to the host: go on decoding with it, also with `wait=False`. What was appended
    and not yet advanced (`kvjax.decode.append`) is not saved.

    Args:
      cache: on any mesh; in several processes each calls this.
      directory: made if missing; one that all processes share, or gs:// and the like.
      tokens: `[B, S]` integers, the text in the cache, right-padded to its longest row; kept for `load_cache`.
      model: whose fingerprint is kept, so that another model's cache is refused when it is loaded.
      wait: return when the files are written. Else call `wait()` of the result before the program ends: what is not
        written by then is lost, and the former save stays.

    Raises:
      ValueError: one line, for a file, and for a cache that was consumed.
      OSError: one line, where it could not be written (from `wait()` too).
    """
    if isinstance(cache.length, jax.core.Tracer):
        raise ValueError("`cache` is traced; save it outside jit.")
    checks.alive(cache)
    leaves = _leaves(cache)
    if tokens is not None:
        leaves["tokens"] = _checked(tokens, cache)
    return write(directory, "cache", leaves, _facts.of_cache(cache, model), wait)


def load_cache(
    directory: Any,
    model: Any,
    policy: Policy | None = None,
    *,
    capacity: int | None = None,
    mesh: Any = None,
    target: str | None = None,
) -> tuple[KVCache, np.ndarray | None]:
    """Loads the newest complete save of a cache, onto any mesh.

    Codes, recent tokens and fitted constants are those that were saved, to the bit. `policy` needs none of its own: its
    codecs and windows are compared, its constants are not, because codes mean nothing with others.

    Device memory beyond the cache: none where `seq` and the number of blocks stay; where they differ, twice a device's
    share of one layer of one array, and where a smaller `capacity` is asked for, one array of sealed storage (all its
    layers) as it was saved.

    Args:
      directory: as `save_cache` was given. Should another save be completed while this one is read, load again.
      model: the model of the cache, or its `CacheShape`.
      policy: what the cache is wanted to be stored by; None for what it is.
      capacity: tokens per row, rounded up as in `init_cache`; None for the saved. May be larger (room for more) and
        smaller, if every row fits.
      mesh: devices to spread it over, from `kvjax.sharding.make_mesh`; None for the default device.
      target: as in `init_cache`.

    Returns:
      The cache, and the tokens that were saved with it, or None.

    Raises:
      ValueError, FileNotFoundError: one line, for a directory without a save, one that is damaged, and one of another
        model or policy.
    """
    with Save(directory, "cache") as save:
        shape = _check_model(save, model)
        if policy is not None:
            _check_policy(save, policy)
        abstract = _abstract(save, shape, capacity, mesh, target)
        lengths = save.facts["lengths"]
        longest = max(lengths)
        if longest > abstract.capacity:
            raise ValueError(
                f"`capacity={capacity}` is {abstract.capacity} in whole blocks, and row {lengths.index(longest)} of "
                f"the cache in {directory} holds {longest} tokens; pass capacity={longest} or more."
            )
        return _read(save, abstract, shape), _read_tokens(save, mesh)


def load_policy(directory: Any) -> Policy:
    """The policy that the cache in a directory was made with, fitted constants included."""
    with Save(directory, "cache") as save:
        wanted = {
            name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"])
            for name, leaf in save.facts["leaves"].items()
            if _is_constant(name)
        }
        return _facts.to_policy(save.facts, save.read(wanted) if wanted else {})


def read_facts(directory: Any, model: Any = None) -> dict[str, Any]:
    """What the newest save of a cache says of itself: `policy`, `lengths`, `capacity`, `block`, `dtype`, `bytes`.

    With a model, raises as `load_cache` where the cache is another's.
    """
    with Save(directory, "cache") as save:
        if model is not None:
            _check_model(save, model)
        return save.facts | {"bytes": save.nbytes}


def _leaves(cache: KVCache) -> dict[str, Any]:
    """What is saved: all but pending tokens, the model's frequencies, and arrays without elements."""
    return {n: leaf for n, leaf in named(cache).items() if leaf.size and n.split(".")[0] not in ("pending", "shape")}


def _is_constant(name: str) -> bool:
    return name.split(".")[2:3] in (["k_params"], ["v_params"])


def _is_sealed(name: str) -> bool:
    return name.split(".")[2:3] in (["k"], ["v"])


def _checked(tokens: Any, cache: KVCache) -> np.ndarray:
    tokens = np.asarray(tokens)
    wanted = (cache.batch, int(sharding.on_host(cache.length).max()))
    if tokens.shape != wanted or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"`tokens` of shape {tokens.shape} and type {tokens.dtype} must be integers {wanted}, [B, S]: the tokens "
            "that the cache holds (the last one sampled is not in it until it is fed); leave them out to save none."
        )
    return tokens.astype(np.int32)


def _check_model(save: Save, model: Any) -> CacheShape:
    """The model's shape; raises where the saved cache is another's."""
    shape = model if isinstance(model, CacheShape) else decode.shape_of(model)
    for key, now, before in _facts.differences(_facts.of_shape(shape), save.facts["shape"]):
        raise ValueError(
            f"`model` has {key}={now!r}, and the cache in {save.directory} was made for {before!r}; "
            "load it with the model that it was made with."
        )
    fingerprint = _facts.fingerprint(model) if save.facts["model"] else None
    if fingerprint and fingerprint != save.facts["model"]:
        raise ValueError(
            f"`model` has other weights (fingerprint {fingerprint[:12]}) than the one that filled the cache in "
            f"{save.directory} ({save.facts['model'][:12]}); load it with that model."
        )
    return shape


def _check_policy(save: Save, policy: Policy) -> None:
    for key, now, before in _facts.differences(_facts.of_policy(policy), save.facts):
        raise ValueError(
            f"`policy` {policy.name!r} has {key}={now!r}, and the cache in {save.directory} ({save.facts['policy']}) "
            f"was stored with {before!r}; leave `policy` out to take what is saved."
        )


def _abstract(save: Save, shape: CacheShape, capacity: int | None, mesh: Any, target: str | None) -> KVCache:
    """The cache to be loaded, as ShapeDtypeStructs, on a mesh with shardings."""
    known = save.facts
    params = {
        name: np.broadcast_to(np.zeros((), leaf["dtype"]), leaf["shape"])
        for name, leaf in known["leaves"].items()
        if _is_constant(name)
    }
    policy = _facts.to_policy(known, params)

    def make() -> KVCache:
        return decode.init_cache(
            shape,
            policy,
            batch=len(known["lengths"]),
            capacity=known["capacity"] if capacity is None else capacity,
            dtype=known["dtype"],
            block=known["block"],
            target=target,
            mesh=mesh,
        )

    return sharding.placed(jax.eval_shape(make))


def _read_tokens(save: Save, mesh: Any) -> np.ndarray | None:
    tokens = save.facts["leaves"].get("tokens")
    if tokens is None:
        return None
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    wanted = jax.ShapeDtypeStruct(tuple(tokens["shape"]), np.int32, sharding=whole)
    return np.asarray(save.read({"tokens": wanted})["tokens"])


def _read(save: Save, abstract: KVCache, shape: CacheShape) -> KVCache:
    """The leaves: read where they are, then sealed blocks moved where they belong, one array after the other."""
    known = save.facts
    blocks, stripes = known["blocks"], known["stripes"]
    new_blocks, new_stripes = jax.tree.leaves(abstract.segments[0].v)[0].shape[2], abstract.stripes
    final = _leaves(abstract)
    otherwise = as_saved(abstract, known.get("joined", [[1, 1]] * len(abstract.segments)))
    wanted = {name: otherwise[name][0] if name in otherwise else leaf for name, leaf in final.items()}
    rest = set(known["leaves"]) - set(wanted) - {"tokens"}
    if rest:
        raise ValueError(f"`directory={save.directory}` holds {min(rest)}, which this version of kvjax has not.")
    moved = {}
    if (blocks, stripes) != (new_blocks, new_stripes):
        moved = {name: leaf for name, leaf in wanted.items() if _is_sealed(name)}
    for name, want in wanted.items():
        expected = list(want.shape)
        if name in moved:
            expected[2] = blocks
        save.check(name, expected, want.dtype)
    found = save.read({name: want for name, want in wanted.items() if name not in moved})
    for name, want in moved.items():
        padded = (*want.shape[:2], max(new_blocks, blocks + -blocks % new_stripes), *want.shape[3:])
        stored = save.read({name: jax.ShapeDtypeStruct(padded, want.dtype, sharding=want.sharding)})
        spec = getattr(want.sharding, "spec", PartitionSpec())
        found[name] = restripe(stored.pop(name), blocks, stripes, new_blocks, abstract.mesh, spec)
        jax.block_until_ready(found[name])  # what it was made of is gone before the next is read
    for name, (_, rearrange) in otherwise.items():
        found[name] = jax.block_until_ready(rearrange(found[name]))
    own = named({"shape": shape})

    def leaf(name: str, want: Any) -> jax.Array:
        if name in found:
            return found[name]
        if name in own:  # the cache is donated: it shares nothing with the model
            fresh = jnp.array(own[name], copy=True)
            return fresh if want.sharding is None else jax.device_put(fresh, want.sharding)
        return jnp.zeros(want.shape, want.dtype, device=want.sharding)

    return jax.tree.unflatten(jax.tree.structure(abstract), [leaf(*item) for item in named(abstract).items()])
