"""Storage methods. A new one is a file here and a line in `CODECS`."""

from kvjax.codecs.base import AbstractCodec
from kvjax.codecs.identity import IdentityCodec
from kvjax.codecs.kvquant import NUQChannelCodec, NUQTokenCodec

CODECS: dict[str, type[AbstractCodec]] = {
    "identity": IdentityCodec,
    "nuq_channel": NUQChannelCodec,
    "nuq_token": NUQTokenCodec,
}
