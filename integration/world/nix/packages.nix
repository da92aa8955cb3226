# Every Debian package of packages.json as one derivation. packages.json maps a
# package name to { version, deb, deps }; deps have no cycles. Nothing here
# names a place outside of the store, so the same packages give the same store
# paths on every machine.
let
  packages = builtins.fromJSON (builtins.readFile ./packages.json);

  # Characters Debian allows in names and versions and Nix does not.
  clean = builtins.replaceStrings [ ":" "%3a" "~" ] [ "." "." "-" ];
  withoutEpoch = v: let m = builtins.match "[0-9]+:(.*)" v; in if m == null then v else builtins.head m;

  run = attrs: derivation ({
    system = builtins.currentSystem;
    builder = "/bin/bash";
    PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
  } // attrs);

  # A set of all packages; revision.NAME rebuilds NAME, and so all that depends
  # on it, with one small change.
  build = { revision ? { }, replace ? { } }:
    let
      chosen = packages // replace;
      one = name: p: run {
        name = clean "${name}-${withoutEpoch p.version}";
        args = [ ./unpack.sh ];
        # What is particular to some packages.
        fix = let own = ./fix + "/${name}.sh"; in if builtins.pathExists own then own else "";
        package = name;
        revision = revision.${name} or "";
        deb = builtins.path { path = ./debs + "/${p.deb}"; name = clean p.deb; };
        # Everything reachable is searched for libraries and interpreters; Nix
        # keeps as references only what the result then mentions.
        search = map (n: all.${n}) (reachable p.deps);
      };
      reachable = names: map (x: x.key) (builtins.genericClosure {
        startSet = map (n: { key = n; }) names;
        operator = x: map (n: { key = n; }) chosen.${x.key}.deps;
      });
      all = builtins.mapAttrs one chosen // {
        python = run {
          name = clean "python3-env-${withoutEpoch chosen.python3.version}";
          args = [ ./python.sh ];
          search = map (n: all.${n}) (reachable [ "python3" "python3-numpy" "dash" ]);
        };
        compiler = run {
          name = clean "gcc-env-${withoutEpoch chosen.gcc.version}";
          args = [ ./compiler.sh ];
          search = map (n: all.${n}) (reachable [ "gcc" "libc6-dev" "dash" ]);
        };
      };
    in
    all;
in
{ inherit packages build; }
