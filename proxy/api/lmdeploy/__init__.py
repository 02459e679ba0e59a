"""LMDeploy's native endpoints of 2023, and conversations that the server keeps."""
