"""Diffusion maths as plain functions, without networks: the discrete chain (DDPM, DDIM) and the continuous VP-SDE."""
