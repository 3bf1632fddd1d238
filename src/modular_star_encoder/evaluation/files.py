"""Files and folders that appear whole or not at all: names of `data.files`, where every room may use them."""

from modular_star_encoder.data.files import check_writable, staged_folder, write_json

__all__ = ["check_writable", "staged_folder", "write_json"]
