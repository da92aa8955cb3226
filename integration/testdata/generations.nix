# What the commands of generations.sh build; gen keeps the runs apart.
{ gen }:
let
  make = name: script: more: derivation ({
    name = "${name}-${gen}";
    system = "x86_64-linux";
    builder = "/bin/sh";
    args = [ "-e" "-c" script ];
  } // more);
  fixed = algo: make "fixed-${algo}" "echo fixed ${gen} > $out" {
    outputHashMode = "flat";
    outputHashAlgo = algo;
    outputHash = builtins.hashString algo "fixed ${gen}\n";
  };
  ca = { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
in rec {
  # One output refers to another, and one to itself.
  multi = make "multi" "echo a line of the builder; echo one > $out; echo $out > $dev; echo $man > $man" { outputs = [ "out" "dev" "man" ]; };
  structured = make "structured" ''
    read -r json < .attrs.json || : # Nix 2.8 names another place where it has a sandbox
    rest=''${json#*'"outputs":{"out":"'}
    out=''${rest%%'"'*}
    case $json in *'"list":["a","b c"]'*) echo structured > $out;; esac
  '' { __structuredAttrs = true; list = [ "a" "b c" ]; };
  imported = import (make "imported" "echo '{ said = \"by a build ${gen}\"; }' > $out" { });
  user = make "user" "read x < $dep; echo $x > $out; echo $dep >> $out" { dep = multi.dev; };
  md5 = fixed "md5";
  sha1 = fixed "sha1";
  sha256 = fixed "sha256";
  sha512 = fixed "sha512";
  wrong = make "wrong" "echo wrong > $out" { outputHashMode = "recursive"; outputHashAlgo = "sha256"; outputHash = builtins.hashString "sha256" ""; };
  fails = make "fails" "echo last words; exit 3" { };
  needsFails = make "needs-fails" "echo $dep > $out" { dep = fails; };
  restless = make "restless" "read x y < /proc/uptime; echo $x > $out" { };
  content = make "content" "echo content ${gen} > $out" ca;
  contentUser = make "content-user" "read x < $dep; echo $x $dep > $out" ({ dep = content; } // ca);
  contentMixed = make "content-mixed" "read x < $dep; echo $x > $out" { dep = contentUser; };
}
