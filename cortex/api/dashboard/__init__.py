"""The dashboard: the page for browsers at `/` and its files, without a build step. `static/vendor/vendor.json` names
the libraries."""
