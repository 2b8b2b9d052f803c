"""Configs that come with the package: `looped configs` lists them."""
