"""A solver in one file: the explicit midpoint method, second order, two evaluations a step but the last."""

import math
from itertools import pairwise

from looped.diffusion.edm import ode_derivative


def sample_midpoint(denoise, z, sigmas, *, callback=None, random=None):
    """dz/dsigma at the geometric middle of each step; the last step, down to 0, ends in the estimate."""
    levels = [float(sigma) for sigma in sigmas]
    D = z
    for step, (sigma, lower) in enumerate(pairwise(levels)):
        D = denoise(z, sigma)
        if callback is not None and callback(step, sigma, z, D):
            break
        slope = ode_derivative(z, D, sigma)
        if lower > 0:
            middle = math.sqrt(sigma * lower)
            ahead = z + (middle - sigma) * slope
            slope = ode_derivative(ahead, denoise(ahead, middle), middle)
        z = z + (lower - sigma) * slope
    return D
