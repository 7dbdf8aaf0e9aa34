"""The Python API: the functions that `import pho_service as pho` gives, a file for each noun."""
