#!/usr/bin/env bash
# Makes .venv on first use, with the CPU or the CUDA builds of torch and FBGEMM, never both.
# Sourced by tools/quickstart.sh and tools/test.sh: afterwards `python` is the one of .venv.
#   MEDSCALE_PYTHON   the Python to build .venv with (default python3.11, else python3)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=$root/.venv
torch_version=2.13.0 torchrec_version=1.8.0 fbgemm_version=1.8.0   # a matched set: see `medscale doctor`

if nvidia-smi -L >/dev/null 2>&1; then flavour=cuda; else flavour=cpu; fi
# Installed again whenever what is asked for changes.
wanted="$flavour $torch_version $torchrec_version $fbgemm_version $(sha256sum pyproject.toml | cut -c1-16)"

# A subshell, so that its trap cleans up and its failures end it.
install_everything() (
    local python=${MEDSCALE_PYTHON:-$(command -v python3.11 || command -v python3)}
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || {
        echo "medscale needs Python 3.11 or 3.12; $python is $("$python" -V). Set MEDSCALE_PYTHON." >&2
        exit 1
    }
    echo "setting up .venv ($flavour builds; some minutes, once) ..." >&2
    # Builds of the other flavour would satisfy the same requirements and stay, so the environment is made afresh.
    [ "$(cut -d' ' -f1 "$venv/medscale-setup" 2>/dev/null)" = "$flavour" ] || rm -rf "$venv"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    # Modules are compiled when they are first imported: most never are, and compiling all takes as long as the rest.
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check) scratch
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    if [ "$flavour" = cpu ]; then
        "${pip[@]}" install -q --no-compile 'pip>=23.2'
        # The configured sources first; PyTorch's own index of CPU builds where they have none.
        cpu_index=https://download.pytorch.org/whl/cpu
        "${pip[@]}" install -q --no-compile "torch==$torch_version+cpu" 2>"$scratch/torch.log" ||
            "${pip[@]}" install -q --no-compile "torch==$torch_version+cpu" --index-url "$cpu_index" ||
            { cat "$scratch/torch.log" >&2; exit 1; }
        # torchrec asks for `fbgemm-gpu` by name, which on the configured sources is the CUDA wheel; the CPU build has
        # another name there and owns the same folder. An empty wheel of the asked name that needs the CPU build keeps
        # the CUDA one out and `pip check` clean. PyTorch's index has the CPU build under the asked name.
        if "${pip[@]}" install -q --no-compile "fbgemm-gpu-cpu==$fbgemm_version" 2>"$scratch/fbgemm.log"; then
            "$venv/bin/python" tools/fbgemm_cpu_shim.py "$fbgemm_version" "$scratch"
        else
            "${pip[@]}" install -q --no-compile "fbgemm-gpu==$fbgemm_version+cpu" --index-url "$cpu_index" ||
                { cat "$scratch/fbgemm.log" >&2; exit 1; }
        fi
        printf '%s\n' "torch==$torch_version+cpu" "torchrec==$torchrec_version" \
            "fbgemm-gpu==$fbgemm_version+cpu" > "$scratch/constraints.txt"
    else
        printf '%s\n' "torch==$torch_version" "torchrec==$torchrec_version" \
            "fbgemm-gpu==$fbgemm_version" > "$scratch/constraints.txt"
    fi
    "${pip[@]}" install -q --no-compile --find-links "$scratch" -c "$scratch/constraints.txt" -e '.[test]'
    "${pip[@]}" check
    echo "$wanted" > "$venv/medscale-setup"
)

[ "$(cat "$venv/medscale-setup" 2>/dev/null)" = "$wanted" ] || install_everything >&2
export PATH="$venv/bin:$PATH"
