"""sora_jax: text-conditioned diffusion transformers over packed spacetime patches."""
