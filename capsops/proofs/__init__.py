"""On which devices kernels are proved: what ships, what a check leaves in the user's cache, and the check."""
