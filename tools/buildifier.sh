#!/bin/sh
# Checks the Bazel files with buildifier, which comes from npm once into .cache, or rewrites them.
#
# usage: tools/buildifier.sh check|fix
# Status 3: there is no npm here, or no buildifier for this machine.
set -eu

cd "$(dirname "$0")/.."
version=8.2.1
case $1 in
  check) options='-mode=check -lint=warn' ;;
  fix) options='-mode=fix -lint=fix' ;;
  *) echo "usage: tools/buildifier.sh check|fix" >&2; exit 2 ;;
esac
case $(uname -sm) in
  'Linux x86_64') binary=buildifier-linux_amd64 ;;
  'Linux aarch64') binary=buildifier-linux_arm64 ;;
  'Darwin arm64') binary=buildifier-darwin_arm64 ;;
  'Darwin x86_64') binary=buildifier-darwin_amd64 ;;
  *) echo "There is no buildifier for $(uname -sm)."; exit 3 ;;
esac

target=.cache/buildifier-$version
if [ ! -x "$target" ]; then
  command -v npm >/dev/null || { echo "There is no npm to fetch buildifier with."; exit 3; }
  mkdir -p .cache
  work=$(mktemp -d .cache/buildifier.XXXXXX)
  trap 'rm -rf "$work"' EXIT
  npm pack --silent --pack-destination "$work" "@bazel/buildifier@$version" >/dev/null
  tar xzf "$work"/*.tgz -C "$work" "package/$binary"
  chmod +x "$work/package/$binary"
  mv "$work/package/$binary" "$target"
fi
# shellcheck disable=SC2086  # several options
find BUILD.bazel MODULE.bazel WORKSPACE bazel kernels tests -type f \
  \( -name '*.bazel' -o -name '*.bzl' -o -name WORKSPACE \) \
  -exec "$target" $options {} +
