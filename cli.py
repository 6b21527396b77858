"""`python cli.py …` in a clone: the same commands as the installed `featstore`."""

from trainer.commands.main import main

if __name__ == "__main__":
    main()
