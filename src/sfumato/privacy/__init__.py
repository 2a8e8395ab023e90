"""Every guarantee is made here and only here: budget, accounting, ledger, noise, sampling, mechanisms, DP-SGD."""
