# Sourced by the other scripts, in the repository's root: `prepare EXTRA` makes `python` one that has jaxmem installed
# with that extra. Uses the active virtual environment, else .venv, which it creates. Installs again only when this
# folder or its setup.py is another one than at the last install.

find_python() {
  local name
  for name in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "jaxmem needs Python 3.11, 3.12 or 3.13; set PYTHON=/path/to/python3 if it has another name" >&2
  return 1
}

activate() {
  local python
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
      python=$(find_python) || return 1
      echo "creating .venv with $("$python" --version)"
      "$python" -m venv .venv
    fi
    export VIRTUAL_ENV="$PWD/.venv"
  fi
  export PATH="$VIRTUAL_ENV/bin:$PATH"
}

prepare() {
  local extra=$1 stamp tree
  activate
  stamp="$VIRTUAL_ENV/.jaxmem-installed"
  tree="$PWD $(cksum setup.py)"
  if [ "$(head -n 1 "$stamp" 2>/dev/null)" != "$tree" ]; then echo "$tree" >"$stamp"; fi
  if grep -qx "extra $extra" "$stamp"; then return; fi
  echo "installing jaxmem[$extra] into $VIRTUAL_ENV (a few minutes the first time)"
  # TORCH_INDEX: one more package index, such as that of torch builds without CUDA libraries
  python -m pip install --quiet --disable-pip-version-check ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -e ".[$extra]"
  echo "extra $extra" >>"$stamp"
}
