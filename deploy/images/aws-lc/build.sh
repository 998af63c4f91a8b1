#!/bin/sh
# Builds the package cryptography, on which pyOpenSSL and so all TLS of the mesh stands, with AWS-LC inside instead of OpenSSL:
#
#     sh deploy/images/aws-lc/build.sh DIRECTORY          # leaves the wheel in DIRECTORY/wheel; nothing is done where it is already
#     sh deploy/images/aws-lc/build.sh DIRECTORY relock   # renews Cargo.lock here, after a change of cryptography's version
#
# Why: docs/design/decisions/0010-aws-lc.md. Needs Rust (cargo), a C compiler, a Python of 3.11 or newer with venv and its headers, the package
# index and crates.io. The version is that of constraints.txt; Cargo.lock has those of all crates, AWS-LC itself among them, and their digests.
set -eu
work=$1
here=$(cd "$(dirname "$0")" && pwd)
version=$(sed -n 's/^cryptography==//p' constraints.txt)
cffi=$(sed -n 's/^cffi==//p' constraints.txt)
wheel=$(ls "$work/wheel/cryptography-$version-"*.whl 2>/dev/null || true)
if [ -n "$wheel" ] && [ -z "$(find "$here" -newer "$wheel")" ] && [ -z "${2:-}" ]; then exit 0; fi
for program in cargo cc; do
    command -v "$program" >/dev/null || { echo "to build AWS-LC, $program is needed" >&2; exit 1; }
done

rm -rf "$work"
mkdir -p "$work"
work=$(cd "$work" && pwd)
"${PYTHON:-python3}" -m venv "$work/tools"
PATH=$work/tools/bin:$PATH
python=$work/tools/bin/python
pip="$python -m pip --quiet --disable-pip-version-check --no-input"
$pip install maturin==1.16.0 cmake==4.4.3 libclang==18.1.1 setuptools==84.2.1 "cffi==$cffi"
$pip download --no-deps --no-binary cryptography --no-build-isolation --dest "$work" "cryptography==$version"
tar -xf "$work/cryptography-$version.tar.gz" -C "$work"
cd "$work/cryptography-$version"
sed -i 's/^openssl-sys = "\(.*\)"$/openssl-sys = { version = "\1", features = ["aws-lc"] }/' Cargo.toml
if [ "${2:-}" = relock ]; then
    cargo metadata --format-version 1 >/dev/null
    cp Cargo.lock "$here/Cargo.lock"
    exit 0
fi
cp "$here/Cargo.lock" Cargo.lock

# bindgen reads AWS-LC's headers with libclang. Its package has no headers of a compiler's own (stddef.h); those of cc do.
LIBCLANG_PATH=$("$python" -c 'import clang, os; print(os.path.join(next(iter(clang.__path__)), "native"))')
BINDGEN_EXTRA_CLANG_ARGS=-I$(cc -print-file-name=include)
export LIBCLANG_PATH BINDGEN_EXTRA_CLANG_ARGS PYO3_PYTHON="$python" CARGO_TARGET_DIR="$work/target"
# The crate gives every function of AWS-LC a prefix with its own version; one declaration in cryptography lacks it.
prefix=aws_lc_$(sed -n '/^name = "aws-lc-sys"$/{n; s/^version = "\(.*\)"$/\1/p}' Cargo.lock | tr . _)
missing=EVP_PKEY_keygen_deterministic
maturin build --release --locked --strip --interpreter "$python" --out "$work/built" \
    -- -C "link-arg=-Wl,--defsym=$missing=${prefix}_$missing" >"$work/log" 2>&1 ||
    { tail -n 40 "$work/log" >&2; echo "cryptography could not be built with AWS-LC; the whole log is $work/log" >&2; exit 1; }

$pip install --no-deps "$work"/built/*.whl
found=$("$python" -c 'from cryptography.hazmat.backends.openssl import backend; print(backend.openssl_version_text())')
case $found in
    AWS-LC*) echo "$found" ;;
    *) echo "what was built has $found inside, and not AWS-LC" >&2; exit 1 ;;
esac
mv "$work/built" "$work/wheel"
rm -rf "$work/target" "$work/tools" "$work/cryptography-$version" "$work/cryptography-$version.tar.gz"
