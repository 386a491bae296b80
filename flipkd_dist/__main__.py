from flipkd_dist.cli import main

main()
