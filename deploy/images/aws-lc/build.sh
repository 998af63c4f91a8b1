#!/bin/sh
# Builds the package cryptography, on which pyOpenSSL and so all TLS of the mesh stands, with AWS-LC inside instead of OpenSSL:
#
#     sh deploy/images/aws-lc/build.sh DIRECTORY          # leaves the wheel in DIRECTORY/wheel; nothing is done where it is already
#     sh deploy/images/aws-lc/build.sh DIRECTORY relock   # renews Cargo.lock here, after a change of cryptography's version
#
# Why: docs/design/decisions/0010-aws-lc.md. Needs Rust (cargo), a C compiler, a Python of 3.11 or newer with venv and its headers, the package
# index and crates.io. The version is that of constraints.txt; Cargo.lock has those of all crates, AWS-LC itself among them, and their digests.
set -eu
if [ $# -lt 1 ] || [ $# -gt 2 ] || [ "${2:-relock}" != relock ]; then
    echo "usage: sh $0 DIRECTORY [relock]" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
constraints=$here/../../../constraints.txt
version=$(sed -n 's/^cryptography==//p' "$constraints")
cffi=$(sed -n 's/^cffi==//p' "$constraints")
mkdir -p "$1"
work=$(cd "$1" && pwd)
wheel=$(find "$work/wheel" -name "cryptography-$version-*.whl" 2>/dev/null | head -n 1)
if [ -n "$wheel" ] && [ -z "$(find "$here" -newer "$wheel")" ] && [ $# = 1 ]; then exit 0; fi
for program in cargo cc; do
    command -v "$program" >/dev/null || { echo "to build AWS-LC, $program is needed" >&2; exit 1; }
done

# In a directory of its own, so that two builds side by side do not meet; gone in the end, also of a build that was interrupted.
job=$(mktemp -d "$work/job.XXXXXX")
trap 'rm -rf "$job"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
pip() {
    "$python" -m pip --quiet --disable-pip-version-check --no-input "$@"
}
if [ $# = 1 ]; then echo "==> building cryptography $version with AWS-LC (about three minutes)"; fi
"${PYTHON:-python3}" -m venv "$job/tools"
PATH=$job/tools/bin:$PATH
python=$job/tools/bin/python
pip install maturin==1.16.0 cmake==4.4.3 libclang==18.1.1 setuptools==84.2.1 "cffi==$cffi"
pip download --no-deps --no-binary cryptography --no-build-isolation --dest "$job" "cryptography==$version"
tar -xf "$job/cryptography-$version.tar.gz" -C "$job"
cd "$job/cryptography-$version"
sed -i 's/^openssl-sys = "\(.*\)"$/openssl-sys = { version = "\1", features = ["aws-lc"] }/' Cargo.toml
if [ $# = 2 ]; then
    cargo metadata --format-version 1 >/dev/null
    cp Cargo.lock "$here/Cargo.lock"
    exit 0
fi
cp "$here/Cargo.lock" Cargo.lock

# bindgen reads AWS-LC's headers with libclang. Its package has no headers of a compiler's own (stddef.h); those of cc do.
LIBCLANG_PATH=$("$python" -c 'import clang, os; print(os.path.join(next(iter(clang.__path__)), "native"))')
BINDGEN_EXTRA_CLANG_ARGS=-I$(cc -print-file-name=include)
export LIBCLANG_PATH BINDGEN_EXTRA_CLANG_ARGS PYO3_PYTHON="$python" CARGO_TARGET_DIR="$job/target"
# The crate gives every function of AWS-LC a prefix with its own version; one declaration in cryptography lacks it.
prefix=aws_lc_$(sed -n '/^name = "aws-lc-sys"$/{n; s/^version = "\(.*\)"$/\1/p}' Cargo.lock | tr . _)
missing=EVP_PKEY_keygen_deterministic
maturin build --release --locked --strip --interpreter "$python" --out "$job/wheel" \
    -- -C "link-arg=-Wl,--defsym=$missing=${prefix}_$missing" >"$work/log" 2>&1 ||
    { tail -n 40 "$work/log" >&2; echo "cryptography could not be built with AWS-LC; the whole log is $work/log" >&2; exit 1; }

pip install --no-deps "$job"/wheel/*.whl
found=$("$python" -c 'from cryptography.hazmat.backends.openssl import backend; print(backend.openssl_version_text())')
case $found in
    AWS-LC*) echo "$found" ;;
    *) echo "what was built has $found inside, and not AWS-LC" >&2; exit 1 ;;
esac
rm -rf "$work/wheel"
mv "$job/wheel" "$work/wheel"
