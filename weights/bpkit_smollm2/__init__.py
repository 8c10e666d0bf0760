"""Drafters of SmolLM2-135M-Instruct: `drafter`, block diffusion, and `assistant`, autoregressive."""
