"""Every guarantee is made here and only here: budget, accounting, ledger, noise, mechanisms, DP-SGD."""
