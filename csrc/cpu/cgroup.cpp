#include "cgroup.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <sstream>
#include <vector>

namespace fastrec {
namespace {

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

bool lists(const std::string& names, const std::string& name) {
  const std::vector<std::string> parts = split(names, ',');
  return std::find(parts.begin(), parts.end(), name) != parts.end();
}

struct Mount {
  std::string root;  // the group that is seen at `point`
  std::string point;
  bool v2;
};

// Lines of mountinfo (proc(5)): id parent dev root point options [tags] - type source options.
std::vector<Mount> cpu_mounts(const std::string& mountinfo) {
  std::vector<Mount> mounts;
  for (const std::string& line : split(mountinfo, '\n')) {
    const std::vector<std::string> words = split(line, ' ');
    const auto dash = std::find(words.begin(), words.end(), "-");
    if (words.size() < 5 || words.end() - dash < 4) continue;
    const std::string &type = dash[1], &options = dash[3];
    if (type == "cgroup2") mounts.push_back({words[3], words[4], true});
    if (type == "cgroup" && lists(options, "cpu")) mounts.push_back({words[3], words[4], false});
  }
  return mounts;
}

// Lines of /proc/self/cgroup: id:controllers:path, where v2 has id 0 and no controllers.
std::optional<std::string> group_of(const std::string& proc_cgroup, bool v2) {
  for (const std::string& line : split(proc_cgroup, '\n')) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (v2 ? controllers.empty() : lists(controllers, "cpu")) return line.substr(second + 1);
  }
  return std::nullopt;
}

// 0 where the texts name no quota.
int whole_cpus(const std::string& quota_us, const std::string& period_us) {
  std::istringstream quota_text(quota_us), period_text(period_us);
  int64_t quota = 0, period = 0;
  if (!(quota_text >> quota) || !(period_text >> period) || quota <= 0 || period <= 0) return 0;
  return static_cast<int>(std::clamp<int64_t>(quota / period, 1, 1 << 20));
}

int cpus_of(const std::string& folder, bool v2, const ReadFile& read) {
  if (v2) {
    const auto text = read(folder + "/cpu.max");  // "max 100000" or "150000 100000"
    const size_t space = text ? text->find(' ') : std::string::npos;
    if (space == std::string::npos) return 0;
    return whole_cpus(text->substr(0, space), text->substr(space + 1));
  }
  const auto quota = read(folder + "/cpu.cfs_quota_us");  // -1: no quota
  const auto period = read(folder + "/cpu.cfs_period_us");
  return quota && period ? whole_cpus(*quota, *period) : 0;
}

}  // namespace

std::optional<std::string> read_file(const std::string& path) {
  std::ifstream file(path);
  if (!file) return std::nullopt;
  return std::string(std::istreambuf_iterator<char>(file), {});
}

int cgroup_cpus(const ReadFile& read) {
  const auto groups = read("/proc/self/cgroup"), mountinfo = read("/proc/self/mountinfo");
  if (!groups || !mountinfo) return 0;
  int tightest = 0;
  for (const Mount& mount : cpu_mounts(*mountinfo)) {
    std::optional<std::string> group = group_of(*groups, mount.v2);
    if (!group) continue;
    // Relative to what is mounted; a group that lies outside (a container that sees the host's
    // path) is the mounted root itself.
    const std::string root = mount.root == "/" ? "" : mount.root;
    const bool inside = group->compare(0, root.size(), root) == 0 &&
                        (group->size() == root.size() || (*group)[root.size()] == '/');
    std::string below = inside ? group->substr(root.size()) : "";
    if (below == "/" || below.find("/..") == 0) below.clear();
    for (;;) {
      const int cpus = cpus_of(mount.point + below, mount.v2, read);
      if (cpus && (!tightest || cpus < tightest)) tightest = cpus;
      if (below.empty()) break;
      below.resize(below.rfind('/'));
    }
  }
  return tightest;
}

}  // namespace fastrec
