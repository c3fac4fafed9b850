"""One query per row over a compressed context: `api.decode_attention`, its formats and its implementations."""
