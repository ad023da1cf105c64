"""What the tests need besides Python packages, made once and kept outside the checkout."""
