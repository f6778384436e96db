"""OpenVINO folders and the OpenVINO runtime."""
