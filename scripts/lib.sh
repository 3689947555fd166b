# Run a verb of this clone's package: verb NAME [flags]. The scripts of this folder read this file.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"

verb() {
    exec "$(command -v python || echo python3)" -m tove_llava "$@"
}
