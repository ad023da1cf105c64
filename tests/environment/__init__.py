"""Things the tests need besides Python packages, built once and cached outside the checkout."""
