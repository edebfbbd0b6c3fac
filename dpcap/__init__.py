"""dpcap: differentially private representation learning by image captioning, in JAX."""
