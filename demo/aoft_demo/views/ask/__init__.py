"""The view Ask: a picture and the answers of all chosen skills."""
