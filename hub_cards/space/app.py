"""The page of this Space; `python app.py` shows it on your own machine."""

from pathlib import Path

from ecl_hf.publishing.space import build_app

app = build_app(Path(__file__).parent)

if __name__ == "__main__":
    app.launch()
