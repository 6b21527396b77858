# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own data and encoder
#
# From a folder of photos, a file of rows and an encoder of your choice to a model that another
# program can load. The data set here is drawn in a second and the vision encoder made on the spot,
# so that the notebook needs nothing; **each step says what to put in their place**.

# %%
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow keeps its notes to itself

import json
import random
from pathlib import Path

import pandas as pd
from IPython.display import Image, display
from PIL import Image as Pillow
from PIL import ImageDraw

import featstore
import trainer
from featstore.demo import TEXT_PRESET

folder = Path("your_data")
(folder / "photos").mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Photos and rows
#
# Photos: one folder, `<Image_ID>.jpg` (or .png, .webp, .gif, .bmp, .tif, .avif); ids may have
# folders. Rows: JSONL with `Image_ID`, `Hypothesis` and `Label` (entailment or contradiction), the
# SNLI-VE files as they are, CSV, or a Hugging Face data set.
#
# **Yours:** skip this cell.

# %%
COLOURS = {"red": "#d9433f", "green": "#3a9d5d", "blue": "#2d6fc4", "yellow": "#f2b72b"}
draw = random.Random(0)
rows = []
for number in range(300):
    left, right = draw.sample(list(COLOURS), 2)
    photo = Pillow.new("RGB", (96, 64), "#f4f2ec")
    pen = ImageDraw.Draw(photo)
    for colour, x in ((left, 26), (right, 70)):
        x, y = x + draw.randint(-6, 6), 32 + draw.randint(-8, 8)
        pen.ellipse((x - 14, y - 14, x + 14, y + 14), fill=COLOURS[colour])
    photo.save(folder / "photos" / f"photo-{number:03d}.jpg", quality=90)
    absent = draw.choice([colour for colour in COLOURS if colour not in (left, right)])
    present = draw.choice([left, right])
    for colour, label in ((present, "entailment"), (absent, "contradiction")):
        text = f"There is a {colour} circle."
        rows.append({"Image_ID": f"photo-{number:03d}", "Hypothesis": text, "Label": label})
(folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

display(Image(folder / "photos" / "photo-000.jpg"), *rows[:2])

# %% [markdown]
# ## An encoder
#
# A preset is a keras-hub name (`"vit_base_patch16_224_imagenet21k"`), `"hf://owner/name"`, or a
# folder that keras-hub wrote. This writes such a folder: a ViT of two blocks with the weights it
# was born with, which is enough to tell colours. `docs/ENCODERS.md` lists the families.
#
# **Yours:** skip this cell and name your preset below.

# %%
from featstore.encoders.framework import import_framework

import_framework()  # without the lines that TensorFlow prints at start
import keras
import keras_hub

keras.utils.set_random_seed(0)
backbone = keras_hub.models.ViTBackbone(
    image_shape=(48, 48, 3), patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128
)
converter = keras_hub.layers.ViTImageConverter(image_size=(48, 48), scale=1 / 127.5, offset=-1)
backbone.save_to_preset(str(folder / "my_vit"))
converter.save_to_preset(str(folder / "my_vit"))

# %% [markdown]
# ## featstore.toml
#
# One file names everything; its relative paths start at its folder. `python cli.py init` writes one
# in which every setting has its comment. **Yours:** put your names here.

# %%
(folder / "featstore.toml").write_text(f"""
[data]
rows = "rows.jsonl"       # or {{train = "train.jsonl", val = "dev.jsonl", test = "test.jsonl"}}
images = "photos"

[encoders]
vit = "my_vit"            # vit_base_patch16_224_imagenet21k, hf://owner/name, a folder
text = {json.dumps(TEXT_PRESET)}     # distil_bert_base_en_uncased

[train]
k_txt = 1                 # last text layers that train along
lr = 1e-3
epochs = 6
head_dim = 32
mlp_dim = 128
""")
project = featstore.Project.load(folder / "featstore.toml")
project

# %% [markdown]
# ## Look first
#
# What the rows and photos are like before anything is trained: labels, lengths, words that give the
# label away, photos that are nearly the same. `eda.html` has the pictures.

# %%
seen = trainer.eda(project, folder / "runs" / "eda", draws=200)
print(seen["hypothesis_only"]["meaning"])
print(*seen["warnings"], sep="\n")
pd.DataFrame(seen["labels"]).T

# %% [markdown]
# The warning is right: two circles on grey do look alike, whichever colours they have. On real
# photos, keep such pairs in one split (`[data] split_file`).

# %% [markdown]
# ## Extract and train
#
# On many photos ask first what it will take: `python cli.py extract-vit --dry-run`. It may be
# stopped at any time; the same call goes on.

# %%
plan, summary = project.extract("vit")
print(f"{summary.extracted} photos in {summary.seconds:.1f} s; not readable: {summary.failed}")

# %%
run = trainer.train(project)
run.history[["epoch", "loss", "val_loss", "val_accuracy"]].round(3)

# %%
found = run.evaluate("test")
{
    "accuracy": found["at_threshold"]["accuracy"],
    "interval": found["intervals"]["accuracy"],
    "on shuffled photos": found["controls"]["shuffled-images"]["accuracy"],
}

# %% [markdown]
# ## Predict
#
# Rows that need no label, as a table or a file. What cannot be predicted says why.

# %%
new = pd.DataFrame(
    [
        ("photo-000", "There is a red circle."),
        ("photo-000", "There is a blue circle."),
        ("photo-999", "There is a green circle."),
    ],
    columns=["Image_ID", "Hypothesis"],
)
run.predict(new, images=folder / "photos")

# %% [markdown]
# ## One model for elsewhere
#
# From pixels and token ids to the logit, of plain Keras layers. A fresh process loads the file and
# must compute the run's own numbers before it gets its name. `model.onnx`, `model.weights.h5` and a
# SavedModel are written the same way.

# %%
exported = run.export(folder / "model.keras", force=True)
exported["path"], exported["check"]["end_to_end"]

# %% [markdown]
# The same from a shell:
#
#     python cli.py init
#     python cli.py eda
#     python cli.py extract-vit
#     python cli.py train --name first
#     python cli.py evaluate first
#     python cli.py predict first --rows new.csv --out found.csv
#     python cli.py export first model.keras
