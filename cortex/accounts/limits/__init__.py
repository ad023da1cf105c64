"""Limits on what a caller or a model may use: requests and tokens per minute, parallel requests, and budgets.

The arithmetic is pure; one owner in the control admits and settles requests.
"""
