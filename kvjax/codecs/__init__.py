"""Storage methods. A new one is a file here and a line in `CODECS`."""

from kvjax.codecs.affine import AffineCodec
from kvjax.codecs.align import AlignRule as AlignRule
from kvjax.codecs.base import AbstractCodec
from kvjax.codecs.float8 import Float8Codec
from kvjax.codecs.identity import IdentityCodec
from kvjax.codecs.kvquant import NUQChannelCodec, NUQTokenCodec
from kvjax.codecs.planes import IntPlanesCodec, PlanesCodec
from kvjax.codecs.rotated import RotatedCodec

CODECS: dict[str, type[AbstractCodec]] = {
    "identity": IdentityCodec,
    "affine": AffineCodec,
    "float8": Float8Codec,
    "nuq_channel": NUQChannelCodec,
    "nuq_token": NUQTokenCodec,
    "rotated": RotatedCodec,
    "planes": PlanesCodec,
    "int_planes": IntPlanesCodec,
}
