"""Evaluation through real codecs and caches: perplexity and divergence, passkey recall, KVQuant's ablation.

Import from the modules: `from kvjax.evaluate.perplexity import perplexity`.
"""
