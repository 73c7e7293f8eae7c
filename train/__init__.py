"""Training of eviction heads on a frozen model; runs from the checkout: `python -m train.locret configs/...`."""
