// How many CPUs the control groups (v1 and v2) let this process use.
//
// A pure function of file texts, so that tests can feed it any machine.
#pragma once

#include <functional>
#include <optional>
#include <string>

namespace fastrec {

// The text of a file, or nothing if it can't be read.
using ReadFile = std::function<std::optional<std::string>(const std::string& path)>;

std::optional<std::string> read_file(const std::string& path);

// The tightest CPU quota on the way from the process's group up to the mounted root, in whole CPUs,
// at least 1; 0 without a quota. Rounded down: a thread beyond the quota is paid for with
// stalls of up to a period (100 ms) once the quota of a period is spent.
int cgroup_cpus(const ReadFile& read);

}  // namespace fastrec
