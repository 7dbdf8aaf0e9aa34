"""`python -m pho_service`: the command `pho`, where its script is not on the path."""

from pho_service.cli import main

if __name__ == "__main__":
    main(prog_name="pho")
