"""Tensors in, tensors out: quantizers, compressed activations, KV store. Knows nothing of the rest."""
