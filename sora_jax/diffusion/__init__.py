"""Diffusion processes, losses and samplers: pure functions of arrays that know no model."""
