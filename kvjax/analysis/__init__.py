"""What compressing keys or values does to attention, layer by layer, and AsymKV's search over both.

Import from the modules: `from kvjax.analysis.asymmetry import asymmetry`.
"""
