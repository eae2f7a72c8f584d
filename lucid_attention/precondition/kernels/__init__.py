"""Triton kernels of the solve and its gradients. Import it only where Triton is installed."""
