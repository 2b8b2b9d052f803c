"""Task families of looped, installed as `looped.tasks`: one file per family."""
