"""How much memory a model needs: arithmetic, files, interfaces."""
