"""People, who sign in at an issuer of OpenID Connect instead of having an API key.

The control process checks the issuer's tokens and keeps the sessions of browsers. Workers ask it about each of them,
and remember the answer for a short time.
"""
