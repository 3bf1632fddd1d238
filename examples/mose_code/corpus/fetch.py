"""Fetch the packages of corpus.yaml by exact version through apt-get, npm and pip into raw/ (resumable).

usage: fetch.py [debian|npm|pypi|source ...]     Debian sources need a deb-src list of their own: it is made in aptsrc/.
"""
import subprocess, sys
from pathlib import Path
import yaml

HERE = Path(__file__).parent
RAW = HERE / "raw"
APT = """Dir::Etc::sourcelist "{0}/aptsrc/sources.list";
Dir::Etc::sourceparts "-";
Dir::State::lists "{0}/aptsrc/lists";
Dir::Cache "{0}/aptsrc/cache";
APT::Sandbox::User "root";
"""

def run(command, **more):
    return subprocess.run(["nice", "-n", "15", *command], stdout=subprocess.DEVNULL, **more).returncode

def debian(names):
    have = {p.name.split("_")[0] for p in (RAW / "debian").glob("*.deb")}
    todo = [f"{n}={v}" for n, v in names if n not in have]
    for at in range(0, len(todo), 150):
        if run(["apt-get", "download", "-q", "-q", *todo[at:at + 150]], cwd=RAW / "debian"):
            for one in todo[at:at + 150]:   # a version that is gone must not take the others with it
                if not list((RAW / "debian").glob(one.split("=")[0] + "_*.deb")): run(["apt-get", "download", "-q", "-q", one], cwd=RAW / "debian")

def source(names):
    import os
    (HERE / "aptsrc/lists/partial").mkdir(parents=True, exist_ok=True); (HERE / "aptsrc/cache/archives/partial").mkdir(parents=True, exist_ok=True)
    (HERE / "aptsrc/sources.list").write_text(os.environ["DEB_SRC"] + "\n")  # the deb-src line of a mirror
    (HERE / "aptsrc/apt.conf").write_text(APT.format(HERE))
    env = {**os.environ, "APT_CONFIG": str(HERE / "aptsrc/apt.conf")}
    run(["apt-get", "update", "-q"], env=env)
    for n, v in names:
        if not list((RAW / "source").glob(n + "_*.dsc")): run(["apt-get", "source", "--download-only", "-q", "-q", f"{n}={v}"], cwd=RAW / "source", env=env)

def npm(names):
    for n, v in names:
        if not (RAW / "npm" / f"{n.lstrip('@').replace('/', '-')}-{v}.tgz").exists(): run(["timeout", "120", "npm", "pack", "--silent", "--ignore-scripts", f"{n}@{v}"], cwd=RAW / "npm")

def pypi(names):
    for n, v in names:
        if not list((RAW / "pypi").glob(n.replace("-", "_").replace(".", "_") + f"-{v}-*.whl")): run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", f"{n}=={v}"], cwd=RAW / "pypi")

if __name__ == "__main__":
    corpus = yaml.safe_load((HERE / "corpus.yaml").read_text())["packages"]
    for kind in sys.argv[1:] or ["debian", "npm", "pypi", "source"]:
        (RAW / kind).mkdir(parents=True, exist_ok=True)
        if kind == "debian": run(["apt-get", "update", "-q"])
        globals()[kind]([(p["name"], str(p["version"])) for p in corpus[kind]])
