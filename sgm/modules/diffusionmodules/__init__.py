"""Diffusion mathematics: schedules, the denoiser (preconditioner), guidance, samplers, training noise and loss."""
