"""Raw arrays in, raw arrays out: packing and kernels. Never imports kvjax."""
