"""The version of this project; pyproject.toml and ``aoft_deploy.__version__`` take it from here."""

__all__ = ["__version__"]

__version__ = "0.1.0"
