"""Export to OpenVINO folders and run them with OpenVINO."""
