#!/usr/bin/env bash
# A real browser for the tests of pages: Debian's chromium, driven by playwright-core from npm.
#
#   browser.sh install | where
#
#   install   get chromium and npm with apt-get (needs root), and playwright-core with npm into a cache of this user
#   where     print the chromium and the folder of playwright-core, a line each
#
# The cache is GEOSEG_BROWSER_DIR, or geoseg/browser in XDG_CACHE_HOME (~/.cache).
# Exit status: 0 done, 1 failed or refused, 2 wrong usage, 3 something is missing.
set -euo pipefail

readonly PLAYWRIGHT=1.65.1
readonly PROGRAMS=(chromium node npm)
readonly PACKAGES=(chromium nodejs npm)

say() { printf 'browser: %s\n' "$*"; }

refuse() {
  local status=$1
  shift
  say "$@" >&2
  exit "$status"
}

# With several names command -v is content with any of them.
has_programs() {
  local program
  for program in "${PROGRAMS[@]}"; do command -v "$program" >/dev/null || return 1; done
}

has_playwright() { [[ -f $driver/package.json ]]; }

install_packages() {
  if has_programs; then
    say "${PROGRAMS[*]} are already installed"
    return
  fi
  command -v apt-get >/dev/null || refuse 3 "this machine has no apt-get; install by hand: ${PROGRAMS[*]}"
  ((EUID == 0)) || refuse 1 "installing packages needs root; run it with sudo"
  local missing=() place
  for place in "${!PROGRAMS[@]}"; do
    command -v "${PROGRAMS[place]}" >/dev/null || missing+=("${PACKAGES[place]}")
  done
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -q
  apt-get install -y -q --no-install-recommends "${missing[@]}"
}

install_playwright() {
  if has_playwright; then
    say "playwright-core $PLAYWRIGHT is already there"
    return
  fi
  mkdir -p "$folder"
  npm install --prefix "$folder" --no-save --no-audit --no-fund --ignore-scripts --loglevel error \
    "playwright-core@$PLAYWRIGHT"
}

print_places() {
  if ! has_programs || ! has_playwright; then refuse 3 "not installed; run: $0 install"; fi
  command -v chromium
  printf '%s\n' "$driver"
}

(($# == 1)) || refuse 2 "usage: $0 install | where"
folder=${GEOSEG_BROWSER_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/geoseg/browser}/$PLAYWRIGHT
driver=$folder/node_modules/playwright-core

case $1 in
  install)
    install_packages
    install_playwright
    ;;
  where) print_places ;;
  *) refuse 2 "there is no command '$1'; it is one of install, where" ;;
esac
