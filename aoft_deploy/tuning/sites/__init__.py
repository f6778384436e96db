"""Sites: the places of a timm model that can take an update, each with a role."""
