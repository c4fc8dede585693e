"""Autoencoders whose latents the diffusion models are trained on."""
