"""`cortex login` and `cortex logout`: a person at a terminal signs in at the issuer that cortex names."""
